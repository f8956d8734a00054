"""First names that several skills draw from, each with the pronoun it takes in the skills' sentences."""

HER = ("Ana", "Mara", "Nora", "Lucy", "Rosa", "Emma", "Ida", "Vera", "Clara", "Sofia")
HIM = ("Tom", "Omar", "Ivan", "Paul", "Luke", "Hugo", "Karl", "Noah", "Felix", "Diego")
NAMES = HER + HIM
