"""One stage of a run a file; each reads files that an earlier one wrote and writes its own."""
