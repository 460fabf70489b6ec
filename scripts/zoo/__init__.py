"""Walk, rewrite or initialise every model of timm and torchvision."""
