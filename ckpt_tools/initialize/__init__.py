"""New weights for fresh models, corrected for dropout and for the nonlinearity.

Hendrycks & Gimpel 2016, sections 2 and 4. `rewrite.rewrite_init` records one forward of a model as
a graph of operations. `paper_rule` goes through the graph and tells which nonlinearity, dropout and
second moment reach each weight; `followers` tells what stands behind it. `propagated_rule` measures
the second moments with the drawn weights instead.
`rule` has the formula of the divisor that follows from them, and `scheme` draws the weights.
`inplace` does the same for a single weight, without a model, and `verify` measures the outcome.
"""
