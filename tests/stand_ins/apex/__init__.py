"""A stand-in for NVIDIA's apex, which no package index has: its optimizers' interface and arithmetic, on the CPU.

Restated from github.com/NVIDIA/apex at commit 6424da3b4faa6c8f062da4a48c424fff3f02d42d; optimizers.py names the files.
What apex does not take, this refuses.
"""
