"""What pruning costs on a real pretrained ViT: frozen probes of every depth, and fine-tuning at some depths."""
