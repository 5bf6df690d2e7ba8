"""moepress: press Mixture-of-Experts language models so that they fit the machine you own."""

__version__ = "0.1.0"
