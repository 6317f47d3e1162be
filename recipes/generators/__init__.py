"""Generators of other projects in this engine, each a class of three methods: docs/tutorials/other-generators.md."""
