"""What is put into a model that is loaded, and taken out again without a trace: LoRA, textual inversion, IP-Adapter.

Each file reads what people have, knows it by its content, and refuses in one line what does not fit the model.
"""
