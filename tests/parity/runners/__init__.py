"""One module a paper: KINDS maps the kind of a golden case to what runs it."""
