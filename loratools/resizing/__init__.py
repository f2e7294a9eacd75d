"""Changes of rank: which rank each layer gets, what is decomposed and put back, sizes, words."""
