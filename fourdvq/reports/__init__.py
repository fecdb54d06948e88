"""Reports that open in a browser without a network: facts first (`validation`), then charts, then one HTML file."""
