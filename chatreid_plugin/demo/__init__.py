"""The embedded default: a synthetic pedestrian world and a tiny Qwen2-VL, to try everything without any download."""
