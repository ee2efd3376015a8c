"""The instructions that IFBench's training set adds to those of IFEval."""

from __future__ import annotations

from itertools import pairwise
from string import ascii_lowercase

import regex

from .catalogue import OneWord, compare, instruction
from .ifeval import letter_frequency
from .text import characters, count_keyword, count_sentences, lower_words, paragraphs, sentences, words

# ------------------------------------------------------------------------------------------------------------------ copy


@instruction("copy:copy", "copy:copying_simple")
def copies_the_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower() == prompt_to_repeat.strip().lower()


@instruction("copy:copying_multiple")
def copies_the_prompt_often(text: str, *, prompt_to_repeat: str, N: int) -> bool:
    """With six asterisks in between."""
    return [part.strip().lower() for part in text.split("******")] == [prompt_to_repeat.strip().lower()] * N


@instruction("new:copy_span_idx")
def copies_characters(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The characters from index n_start to n_end, both included, from 0."""
    return text.strip().lower() == prompt_to_repeat[n_start : n_end + 1].strip().lower()


@instruction("copy:repeat_phrase")
def varies_the_phrase(text: str, *, phrase: str, small_n: int) -> bool:
    """So often with exactly one word replaced, neither the first nor the last, and never as it is."""
    asked, own = lower_words(phrase), lower_words(text)
    if len(asked) < 3:
        raise ValueError("phrase has no word between the first and the last")
    variants = []
    for start, end in zip(range(len(own)), range(len(asked), len(own) + 1), strict=False):
        if own[start] == asked[0] and own[end - 1] == asked[-1]:
            variants.append(sum(a != b for a, b in zip(own[start:end], asked, strict=True)))
    return variants.count(1) == small_n and 0 not in variants


# --------------------------------------------------------------------------------------------------------------- keywords


@instruction("keywords:word_once")
def keyword_once(text: str, *, keyword: str) -> bool:
    return count_keyword(text, keyword) == 1


@instruction("keywords:word_count_different_numbers")
def keyword_exactly(text: str, *, keyword: str, frequency: int, relation: str = "") -> bool:
    """Exactly so often: the prompt does not name the relation that the table has."""
    return count_keyword(text, keyword) == frequency


@instruction("keywords:exclude_word_harder")
def keyword_never(text: str, *, keyword: str) -> bool:
    return count_keyword(text, keyword) == 0


@instruction("count:count_increment_word")
def keywords_once_and_twice(text: str, *, keyword1: str, keyword2: str) -> bool:
    return count_keyword(text, keyword1) == 1 and count_keyword(text, keyword2) == 2


@instruction("keywords:no_adjacent_consecutive")
def no_adjacent_letters(text: str) -> bool:
    """No word begins with the letter of the alphabet that follows the one before it began with."""
    initials = [word[0] for word in lower_words(text)]
    return bool(initials) and not set(pairwise(initials)) & set(pairwise(ascii_lowercase))


@instruction("keywords:palindrome")
def has_palindrome(text: str) -> bool:
    """A word of three letters at least."""
    found = map(characters, lower_words(text))
    return any(len(word) >= 3 and word == word[::-1] and not word.isdigit() for word in found)


@instruction("keywords:start_end")
def ends_as_it_starts(text: str) -> bool:
    """The same word, and nothing after the last one."""
    found = lower_words(text)
    return len(found) > 1 and found[0] == found[-1] and text.strip()[-1].isalnum()


@instruction("first_word:first_word_answer")
def first_word_is(text: str, *, first_word: OneWord) -> bool:
    return lower_words(text)[:1] == lower_words(first_word)


@instruction("first_word:first_word_sent")
def first_word_of_each_is(text: str, *, first_word: OneWord) -> bool:
    return bool(words(text)) and all(lower_words(one)[:1] == lower_words(first_word) for one in sentences(text))


@instruction("last_word:last_word_answer")
def last_word_is(text: str, *, last_word: OneWord) -> bool:
    return lower_words(text)[-1:] == lower_words(last_word)


@instruction("last_word:last_word_sent")
def last_word_of_each_is(text: str, *, last_word: OneWord) -> bool:
    return bool(words(text)) and all(lower_words(one)[-1:] == lower_words(last_word) for one in sentences(text))


# ----------------------------------------------------------------------------------------------------------------- counts


@instruction("count:lowercase_counting")
def few_lowercase_words(text: str, *, N: int) -> bool:
    return sum(map(str.islower, words(text))) <= N


@instruction("count:count_unique")
def no_word_twice(text: str) -> bool:
    found = lower_words(text)
    return bool(found) and len(found) == len(set(found))


@instruction("count:counting_composition")
def counted_composition(text: str, *, n_sent: int, n_words: int) -> bool:
    """Three paragraphs, parted by `***` or `* * *`, of so many sentences of so many words; marks are no words."""
    parts = paragraphs(text.replace("* * *", "***"), "***")
    counts = [[len(words(sentence)) for sentence in sentences(part)] for part in parts or []]
    return counts == [[n_words] * n_sent] * 3


@instruction("letters:letter_counting")
def count_letters(text: str, *, N: int, relation: str) -> bool:
    return compare(sum(map(str.isalpha, text)), relation, N)


instruction("letters:letter_counting2")(letter_frequency)


@instruction("paragraphs:paragraphs")
def two_divided_paragraphs(text: str) -> bool:
    return len(paragraphs(text, "***") or []) == 2


@instruction("paragraphs:paragraphs2")
def two_spaced_paragraphs(text: str) -> bool:
    """By an empty line."""
    return len(paragraphs(text, "\n\n") or []) == 2


# ----------------------------------------------------------------------------------------------------------------- format


@instruction("detectable_format:sentence_hyphens")
def hyphenated_sentences(text: str) -> bool:
    """A hyphen and no space between two sentences, of which there are two at least."""
    parts = regex.split(r"(?<=[.!?])-", text.strip())
    return len(parts) > 1 and all(part == part.strip() and count_sentences(part) == 1 for part in parts)


@instruction("detectable_format:square_brackets")
def bracketed_words(text: str) -> bool:
    return all(regex.fullmatch(r"\[[^\[\]]++\]\p{P}*+", token) for token in text.split())


_BIGRAMS = regex.compile(r"(?:<<[^\s<>]++\s++[^\s<>]++>>\p{P}*+(?:\s++|\Z))++(?:<<[^\s<>]++>>|[^\s<>]++)?")


@instruction("detectable_format:bigram_wrapping")
def wrapped_bigrams(text: str) -> bool:
    """`<<so it>> <<goes on>>`; a word that is left over stands in them or outside."""
    return _BIGRAMS.fullmatch(text.strip()) is not None


@instruction("punctuation:punctuation_dot")
def has_no_dot(text: str) -> bool:
    return "." not in text


@instruction("punctuation:punctuation_exclamation")
def has_no_exclamation_mark(text: str) -> bool:
    return "!" not in text
