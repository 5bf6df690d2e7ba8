#!/usr/bin/env bash
# Press a model and report, as one step of continuous integration:
#
#     docs/examples/press.sh OUT [MODEL] [options of `moepress run`]
#
# Goes on where an interrupted run in OUT stopped (a cache that was restored, a machine that was taken away), and ends
# with moepress's own exit code: 3 when a threshold was missed, with all files in place. `moepress run` itself appends
# the report to GITHUB_STEP_SUMMARY. What later steps need goes to GITHUB_OUTPUT where there is such a file, and to
# stdout: report, junit, provenance, headline, exit-code.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "Usage: press.sh OUT [MODEL] [options of \`moepress run\`], such as: press.sh out demo --keep 0.75" >&2
    exit 2
fi
out=$1
shift

code=0
moepress run "$@" --output "$out" --resume || code=$?

{
    echo "exit-code=$code"
    if [ "$code" = 0 ] || [ "$code" = 3 ]; then # otherwise what lies there may be of a run before
        echo "report=$out/report.html"
        echo "junit=$out/junit.xml"
        echo "provenance=$out/provenance.json"
        # The first line of the Markdown report, "# demo: 9.2 MB → ...", without the mark and Markdown's backslashes.
        echo "headline=$(sed -n '1{s/^# //;s/\\\([][\\`*_|#]\)/\1/g;p;}' "$out/report.md")"
    fi
} | tee -a "${GITHUB_OUTPUT:-/dev/null}"

exit "$code"
