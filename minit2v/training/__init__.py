"""How networks come to be: the world of the embedded models, their trainers, and fine-tuning.

Of the other folders the command line alone imports it.
"""
