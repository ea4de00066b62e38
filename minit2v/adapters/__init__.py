"""What is put into a model that is there: LoRA, textual inversion, IP-Adapter."""
