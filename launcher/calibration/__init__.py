"""Published runs: read, predicted, compared; and the fit of the constants that the predictions rest on."""
