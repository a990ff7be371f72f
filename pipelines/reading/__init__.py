"""Reading: the samples of coming steps, ahead of the backends."""
