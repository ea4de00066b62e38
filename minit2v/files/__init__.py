"""Where files come from and how they are read and written: hub, configs, weights, videos."""
