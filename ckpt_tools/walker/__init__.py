"""Finding dropout sites and BN layers in a model, and which lies behind which."""
