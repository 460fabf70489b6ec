"""Finding dropout sites and BN layers in a model, and which lies behind which.

`downstream.walk` runs a model a few times on example inputs. `forward_recording` watches one of
these forwards: `taint` follows the random numbers of dropout sites (`dropout_sites` recognises
them) from storage to storage, and `graph` collects the operations. `weights` finds the weight
layers in that graph, with the help of `contractions`.
"""
