"""One module a subcommand of ``fathom``: ``add_parser`` declares its options, ``run`` does it."""
