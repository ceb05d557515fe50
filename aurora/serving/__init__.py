"""Aurora as a service: the web page."""
