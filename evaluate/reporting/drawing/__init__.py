"""Charts and heatmaps as inline SVG."""
