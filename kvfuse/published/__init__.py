"""The authors' published fusers: read safely and strictly, written back, and what is known of each."""
