"""`alpaca-ray lint`: cluster.yaml, serve_config.yaml and recipes, each alone and against each other."""
