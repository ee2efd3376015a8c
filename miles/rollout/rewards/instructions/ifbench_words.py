"""The instructions of IFBench about words, numbers and sentences: its groups count, ratio, words and sentence."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import pairwise
from string import ascii_lowercase

import regex
import syllapy

from .catalogue import OneWord, instruction
from .lexicon import CONJUNCTIONS, PERSON_NAMES, PRONOUNS, STOP_WORDS, starts_with_verb
from .text import (
    characters,
    count_keyword,
    count_runs,
    end_mark,
    full_lines,
    lower_words,
    rises,
    sentences,
    words,
)

# ----------------------------------------------------------------------------------------------------------------- count


@instruction("count:word_count_range")
def word_count_range(text: str, *, min_words: int, max_words: int) -> bool:
    return min_words <= count_runs(text) <= max_words


@instruction("count:unique_word_count")
def unique_word_count(text: str, *, N: int) -> bool:
    return len(set(lower_words(text))) >= N


@instruction("count:conjunctions")
def different_conjunctions(text: str, *, small_n: int) -> bool:
    """Different ones: "And" and "and," are one."""
    return len(CONJUNCTIONS.intersection(lower_words(text))) >= small_n


@instruction("count:person_names")
def person_names(text: str, *, N: int) -> bool:
    """Different ones of the fifty that the prompt lists, as whole words; a possessive counts."""
    return len(PERSON_NAMES.intersection(word.removesuffix("'s") for word in words(text))) >= N


_NUMBER = regex.compile(r"\d{1,3}+(?:,\d{3}(?!\d))++(?:\.\d++)?|\d++(?:\.\d++)?")


@instruction("count:numbers")
def count_numbers(text: str, *, N: int) -> bool:
    """3.14 and 100,000 are one number each; 3-4, 10:30 and 1,2 are two."""
    return sum(1 for _ in _NUMBER.finditer(text)) == N


@instruction("count:punctuation")
def has_all_punctuation(text: str) -> bool:
    """`. , ! ? ; :` and an interrobang; the marks of that one do not count as the others."""
    marks = set(".,!?;:")
    return any(bang in text and marks <= set(text.replace(bang, "", 1)) for bang in ("‽", "?!", "!?"))


_JAPANESE = regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Han}]")


@instruction("count:words_japanese")
def nth_words_are_japanese(text: str, *, N: int) -> bool:
    """Words as white space parts them; there must be N of them at least."""
    if N < 1:
        raise ValueError("N must be at least 1")
    picked = [token for token in text.split() if words(token)][N - 1 :: N]
    return bool(picked) and all(map(_JAPANESE.search, picked))


@instruction("count:pronouns")
def count_pronouns(text: str, *, N: int) -> bool:
    """Those in contractions too: "it's"."""
    return sum(word.split("'")[0] in PRONOUNS for word in lower_words(text)) >= N


@instruction("count:keywords_multiple")
def keywords_so_often(text: str, *, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    """Whole words: once, twice, three, five and seven times."""
    asked = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    return all(count_keyword(text, keyword) == times for keyword, times in asked)


# ----------------------------------------------------------------------------------------------------------------- ratio


@instruction("ratio:stop_words")
def few_stop_words(text: str, *, percentage: float) -> bool:
    """A contraction is a stop word if what stands before its apostrophe is one."""
    found = lower_words(text)
    stops = sum(word.split("'")[0] in STOP_WORDS for word in found)
    return bool(found) and 100 * stops <= percentage * len(found)


def _marks(text: str) -> Counter[str]:
    return Counter(map(end_mark, sentences(text)))


@instruction("ratio:sentence_type")
def two_statements_a_question(text: str) -> bool:
    """Two that end with a full stop for each that ends with a question mark, and there is one."""
    marks = _marks(text)
    return marks["."] == 2 * marks["?"] > 0


@instruction("ratio:sentence_balance")
def balanced_sentence_types(text: str) -> bool:
    """As many that end with `.` as with `?` and with `!`, and there are some."""
    marks = _marks(text)
    return marks["."] == marks["?"] == marks["!"] > 0


def _trigrams(text: str) -> set[tuple[str, ...]]:
    tokens = regex.findall(r"\w++|[^\w\s]", text)
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


@instruction("ratio:overlap")
def trigram_overlap(text: str, *, reference_text: str, percentage: float) -> bool:
    """The share of the response's different trigrams, of words and marks, that the reference has too; 2 points off at most."""
    own = _trigrams(text)
    return bool(own) and abs(100 * len(own & _trigrams(reference_text)) / len(own) - percentage) <= 2


@instruction("ratio:sentence_words")
def three_equal_sentences(text: str) -> bool:
    """Three sentences of as many characters, marks and spaces included; no word is there twice."""
    found, used = sentences(text), lower_words(text)
    return len(found) == 3 and len(set(map(len, found))) == 1 and len(used) == len(set(used))


# ----------------------------------------------------------------------------------------------------------------- words


@instruction("words:alphabet")
def alphabet_loop(text: str) -> bool:
    """Each word begins with the letter after that of the word before, `a` after `z`."""
    initials = [word[0] for word in lower_words(text)]
    after = dict(pairwise(ascii_lowercase + "a"))
    return len(initials) > 1 and all(after.get(letter) == following for letter, following in pairwise(initials))


def _plain(text: str) -> str:
    """Lower case without accents."""
    return "".join(char for char in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(char))


@instruction("words:vowel")
def three_vowels(text: str) -> bool:
    """One paragraph with three of the five vowels at most."""
    return len(full_lines(text)) == 1 and len(set("aeiou").intersection(_plain(text))) <= 3


_CLUSTER = regex.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")


@instruction("words:consonants")
def consonant_clusters(text: str) -> bool:
    """Two consonants side by side in each word; `y` is one."""
    found = words(_plain(text))
    return bool(found) and all(map(_CLUSTER.search, found))


@instruction("words:palindrome")
def ten_palindromes(text: str) -> bool:
    """Ten words of five letters at least; the same one may come again."""
    found = map(characters, lower_words(text))
    return sum(len(word) >= 5 and word == word[::-1] and not word.isdigit() for word in found) >= 10


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@instruction("words:prime_lengths")
def prime_lengths(text: str) -> bool:
    """Letters and digits count: "don't" has four."""
    lengths = {len(characters(word)) for word in words(text)}
    return bool(lengths) and all(map(_is_prime, lengths))


@instruction("words:start_verb")
def starts_so(text: str) -> bool:
    return starts_with_verb(lower_words(text[:1000])[:2])


@instruction("words:repeats")
def limited_repeats(text: str, *, small_n: int) -> bool:
    return max(Counter(lower_words(text)).values(), default=small_n + 1) <= small_n


@instruction("words:odd_even_syllables")
def alternating_syllables(text: str) -> bool:
    """Words with an odd and an even number of syllables take turns, by syllapy's dictionary and, beyond it, groups of vowels."""
    parities = [sum(map(syllapy.count, word.split("-"))) % 2 for word in lower_words(text)]
    return len(parities) > 1 and all(before != after for before, after in pairwise(parities))


@instruction("words:last_first")
def last_word_comes_first(text: str) -> bool:
    """The last word of each sentence begins the next; two sentences at least."""
    found = list(map(lower_words, sentences(text)))
    return len(found) > 1 and all(before[-1:] == after[:1] for before, after in pairwise(found))


@instruction("words:paragraph_last_first")
def paragraphs_end_as_they_begin(text: str) -> bool:
    """Paragraphs are lines."""
    found = list(filter(None, map(lower_words, full_lines(text))))
    return bool(found) and all(paragraph[0] == paragraph[-1] for paragraph in found)


@instruction("words:no_consecutive")
def no_alliteration(text: str) -> bool:
    """No two words in a row begin with the same letter."""
    initials = [word[0] for word in lower_words(text)]
    return bool(initials) and all(before != after for before, after in pairwise(initials))


def _nth(items: list[str], n: int) -> str:
    """From 1; "" where there are not so many."""
    if n < 1:
        raise ValueError("positions are counted from 1")
    return items[n - 1] if n <= len(items) else ""


@instruction("words:keywords_specific_position", "keywords:keyword_specific_position")
def keyword_at(text: str, *, keyword: OneWord, n: int, m: int) -> bool:
    """The m-th word of the n-th sentence; marks are no words."""
    return _nth(lower_words(_nth(sentences(text), n)), m) == keyword.strip().lower()


@instruction("words:words_position")
def keyword_second_from_both_ends(text: str, *, keyword: str) -> bool:
    found = lower_words(text)
    return len(found) > 2 and found[1] == found[-2] == keyword.strip().lower()


# -------------------------------------------------------------------------------------------------------------- sentence


def _longest_alliteration(sentence: str) -> int:
    """Words in a row with the same first letter."""
    longest = length = 1
    for before, after in pairwise(lower_words(sentence)):
        length = length + 1 if before[0] == after[0] else 1
        longest = max(longest, length)
    return longest


@instruction("sentence:alliteration_increment")
def growing_alliteration(text: str) -> bool:
    return rises(list(map(_longest_alliteration, sentences(text))))


@instruction("sentence:increment")
def growing_sentences(text: str, *, small_n: int) -> bool:
    """Each has exactly so many words more than the one before."""
    return rises([len(words(sentence)) for sentence in sentences(text)], by=small_n)


@instruction("sentence:keyword")
def keyword_in_sentence(text: str, *, word: str, N: int) -> bool:
    return count_keyword(_nth(sentences(text), N), word) > 0
