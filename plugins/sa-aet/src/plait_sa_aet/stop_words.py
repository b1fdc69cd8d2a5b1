"""Words that the text attack neither replaces nor proposes."""

from __future__ import annotations

from pathlib import Path

_ARTICLES_AND_DETERMINERS = """
a an the this that these those each every either neither some any no all both half many much more most few fewer
fewest less least several enough such own same other another others certain various
"""
_PRONOUNS = """
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself we us our
ours ourselves they them their theirs themselves one ones oneself someone somebody something anyone anybody anything
everyone everybody everything nobody nothing none who whom whose which what whoever whatever whichever
"""
_AUXILIARIES = """
am is are was were be been being do does did doing done have has had having will would shall should can could may
might must ought need dare let lets get gets got cannot
"""
_CONTRACTIONS = """
aint arent cant couldnt didnt doesnt dont hadnt hasnt havent hes im isnt ive mightnt mustnt neednt shant shes shouldnt
thats theyre theyve wasnt wed werent weve wont wouldnt youd youll youre youve
"""
_PREPOSITIONS = """
about above across after against along alongside amid amidst among amongst around as at atop before behind below
beneath beside besides between beyond by despite down during except for from in inside into like near of off on onto
opposite out outside over past per since through throughout till to toward towards under underneath until unto up upon
via versus with within without
"""
_CONJUNCTIONS = """
and but or nor so yet if then than because although though while whilst whereas unless whether once lest
"""
_ADVERBS = """
not very too also just only even still again ever never always often here there where when why how however therefore
thus hence else almost already anyway away back indeed instead maybe meanwhile moreover otherwise perhaps quite rather
really somehow sometimes somewhat somewhere anywhere everywhere nowhere together apart further now later soon
wherever whenever
"""
_PUNCTUATION = ". , ; : ! ? ' \" ` ( ) [ ] { } < > - – — _ + = * / \\ | & % $ # @ ^ ~ … · ..."

STOP_WORDS: frozenset[str] = frozenset(
    " ".join(
        (
            _ARTICLES_AND_DETERMINERS,
            _PRONOUNS,
            _AUXILIARIES,
            _CONTRACTIONS,
            _PREPOSITIONS,
            _CONJUNCTIONS,
            _ADVERBS,
            _PUNCTUATION,
        )
    ).split()
)
"""English function words, and the punctuation marks that a masked language model likes to propose."""


def read_stop_words(path: str | Path) -> frozenset[str]:
    """The words of a UTF-8 text file, one per line, lower-cased; blank lines do not count.

    Raises:
        ValueError: the file is not there or is not UTF-8 text.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read the stop words in {path}; give a UTF-8 text file with one word per line"
        ) from error
    return frozenset(line.strip().lower() for line in lines if line.strip())
