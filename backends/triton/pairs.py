"""A few rows of E4M3 whose columns are lowered by octaves, each as two rows of E4M3 that hold it to the bit.

    x[m, k] * 2**-octaves[k] = pairs[2 * m, k] + 2**-APART * pairs[2 * m + 1, k]

One of both is zero: the second row has what is too small for the first. Tensor cores multiply eight rows in the time of
one, so that of a few rows the input takes the octaves for little, where the weight would be lowered number by number.
"""

# rows of x up to which twice as many cost less than lowering the weight
MOST_ROWS = 32
# octaves by which the second row is raised: with it E4M3 holds any of its numbers, lowered by up to as many; by one
# more, what is too small for the first row may be too large for the second
APART = 14
