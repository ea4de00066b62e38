"""How networks come to be: the world of the embedded models, their trainers, and fine-tuning.

Nothing in the other folders imports it.
"""
