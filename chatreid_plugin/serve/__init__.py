"""``chatreid serve``: a checkpoint behind an OpenAI-compatible API that gives confidences."""
