"""Do the stored statistics describe the data? Controls, preprocessing hypotheses, and a verdict."""
