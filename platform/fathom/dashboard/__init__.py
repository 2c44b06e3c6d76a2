"""The dashboard: pages in plain HTML, CSS and ES modules, and the routes that serve them."""
