"""Open-ended retrieval in dialogue (paper section 3.3): a gallery, its index, and turns that each add something."""
