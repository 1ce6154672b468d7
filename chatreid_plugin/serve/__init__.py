"""Our own server, ``chatreid serve``: a checkpoint behind an OpenAI-compatible API that gives confidences.

The client that asks such servers, ours or others', is ``openai_client.py``.
"""
