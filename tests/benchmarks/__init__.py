"""A benchmark of session services for google-adk: `make bench`. NOTES.md says how it measures."""
