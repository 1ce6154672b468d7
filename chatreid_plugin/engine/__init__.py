"""DATA: raw folders in, instruction shards out. No torch, no llamafactory."""
