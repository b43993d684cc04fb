"""Everything that a paper shares with other papers; knows none of them."""
