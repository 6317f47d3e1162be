"""A dataset in the browser: a server on loopback, and the page that it serves (docs/viewer.md)."""
