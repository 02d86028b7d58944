"""Questions found again by their meaning: text to vector, the index of vectors, and the cache of answers over both."""
