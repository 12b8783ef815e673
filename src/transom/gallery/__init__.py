"""The gallery: the feed of papers in which every paper that works here runs.

Pages are made of the registry, the cards, the parity record and the measured results; nothing here
knows a paper by name.
"""
