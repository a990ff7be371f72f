"""Commands on finished sets, one file per command."""
