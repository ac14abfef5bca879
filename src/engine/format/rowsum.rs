//! What a set of rows adds up to: a keyed multiset hash, MSet-Add-Hash of Clarke, Devadas, van Dijk, Gassend and Suh
//! (ASIACRYPT 2003). Each row gives a number that only the holder of a key can tell; the sum modulo 2^256 changes at a constant
//! cost with each row, whatever their number. It is sound as long as sums are hidden: they are only ever stored sealed.

use super::codec::{Malformed, Reader, Writer};

/// What one row adds: 256 bits of a PRF, as a big-endian number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Term(pub(crate) [u8; 32]);

/// How many rows there are, and the sum of their terms, which nobody is to see; or by how much both change.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RowSum {
    rows: u64,
    /// The sum as two numbers, the upper half first.
    sum: (u128, u128),
}

impl std::fmt::Debug for RowSum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowSum")
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl Term {
    fn halves(self) -> (u128, u128) {
        let (upper, lower) = self.0.split_at(16);
        let number = |half: &[u8]| half.try_into().map_or(0, u128::from_be_bytes);
        (number(upper), number(lower))
    }
}

impl RowSum {
    /// One row more.
    pub(crate) fn add(&mut self, term: Term) {
        self.merge(Self {
            rows: 1,
            sum: term.halves(),
        });
    }

    /// One row less.
    pub(crate) fn remove(&mut self, term: Term) {
        let row = Self {
            rows: 1,
            sum: term.halves(),
        };
        self.merge(row.negative());
    }

    /// The change that undoes this one: the two's complement.
    fn negative(self) -> Self {
        let (lower, carry) = (!self.sum.1).overflowing_add(1);
        Self {
            rows: self.rows.wrapping_neg(),
            sum: ((!self.sum.0).wrapping_add(u128::from(carry)), lower),
        }
    }

    /// The change that makes this of `other`.
    pub(crate) fn minus(mut self, other: Self) -> Self {
        self.merge(other.negative());
        self
    }

    /// The change that is the sum of both.
    pub(crate) fn merge(&mut self, other: Self) {
        self.rows = self.rows.wrapping_add(other.rows);
        let (lower, carry) = self.sum.1.overflowing_add(other.sum.1);
        let upper = self.sum.0.wrapping_add(other.sum.0);
        self.sum = (upper.wrapping_add(u128::from(carry)), lower);
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.u64(self.rows);
        out.bytes(&self.sum.0.to_be_bytes())
            .bytes(&self.sum.1.to_be_bytes());
    }

    pub(crate) fn read(input: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            rows: input.u64()?,
            sum: (
                u128::from_be_bytes(input.array()?),
                u128::from_be_bytes(input.array()?),
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn term(last: u8, first: u8) -> Term {
        let mut bytes = [0xff; 32];
        bytes[0] = first;
        bytes[31] = last;
        Term(bytes)
    }

    #[test]
    fn what_is_added_and_removed_leaves_nothing_in_any_order() {
        let terms = [term(1, 2), term(0xff, 0xff), term(0, 0), Term([0; 32])];
        let mut sum = RowSum::default();
        for one in terms {
            sum.add(one);
        }
        assert_eq!(sum.rows, 4);
        for one in [terms[2], terms[0], terms[3], terms[1]] {
            sum.remove(one);
        }
        assert_eq!(sum, RowSum::default());
        // A change may be known before what it changes.
        let mut change = RowSum::default();
        change.remove(terms[1]);
        change.add(terms[0]);
        let (mut before, mut after) = (RowSum::default(), RowSum::default());
        before.add(terms[1]);
        after.add(terms[0]);
        before.merge(change);
        assert_eq!(before, after);
    }

    #[test]
    fn carries_go_from_half_to_half() {
        let mut low = [0; 32];
        low[16..].fill(0xff);
        let mut one = [0; 32];
        one[31] = 1;
        let mut sum = RowSum::default();
        sum.add(Term(low));
        sum.add(Term(one));
        assert_eq!(sum.sum, (1, 0));
        sum.remove(Term(one));
        assert_eq!(sum.sum, (0, u128::MAX));
        sum.add(Term([0xff; 32]));
        assert_eq!(sum.sum, (0, u128::MAX - 1));
    }

    #[test]
    fn one_row_twice_is_not_none() {
        let mut sum = RowSum::default();
        sum.add(term(7, 7));
        sum.add(term(7, 7));
        assert_ne!(sum, RowSum::default());
    }
}
