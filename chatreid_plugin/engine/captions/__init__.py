"""``chatreid caption``: captions and attributes of training images from an OpenAI-compatible endpoint."""
