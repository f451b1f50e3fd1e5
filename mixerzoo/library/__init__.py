"""The library: distilled candidates on disk, each under a key of all that made it, each with a checksum.

A candidate is two files: its weights `<key>.safetensors` and then its entry `<key>.json`, each written whole. There
is no file that two candidates share, so that any number of processes can work on one library.
"""
