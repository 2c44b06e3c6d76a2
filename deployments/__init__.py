"""The Ray Serve application: one file a deployment class, ``app.py`` puts them together."""
