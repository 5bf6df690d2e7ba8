"""What any long work needs, knowing nothing of models: a journal, progress, phases, a terminal."""
