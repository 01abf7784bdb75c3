"""Stage Report: what a run found, as one page, as JSON and as Markdown."""
