"""For each instruction of IFBench: its arguments, responses that follow it and responses that do not."""

from __future__ import annotations

from typing import Any, TypeAlias

Case: TypeAlias = tuple[str, dict[str, Any], list[str], list[str]]

FIVE = {f"keyword{n}": word for n, word in enumerate(("ant", "bee", "cat", "dog", "emu"), start=1)}
FIVE_FOUND = "An ant. " + "bee " * 2 + "CAT, " * 3 + "dog's " * 5 + "emu " * 7
NAMES = "Emma, Liam and Mia"
SPAN = {"prompt_to_repeat": "zero one two three four", "n_start": 1, "n_end": 3}
REQUEST = {"prompt_to_repeat": "Write a poem"}
ALPHABET = " ".join(f"{letter} is here." for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
CAPITALS = (
    "Reykjavík, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, Amsterdam, "
    "Warsaw, London, Brussels, Kyiv, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chișinău, Bern, "
    "Ljubljana, Zagreb"
)
AFRICA = """Zimbabwe Zambia Uganda Tunisia Togo Tanzania Sudan South_Sudan South_Africa Somalia Sierra_Leone Seychelles Senegal
São_Tomé_and_Príncipe Rwanda Nigeria Niger Namibia Mozambique Morocco Mauritius Mauritania Mali Malawi Madagascar Libya Liberia
Lesotho Kenya Ivory_Coast Guinea-Bissau Guinea The_Gambia Gabon Ethiopia Eswatini Eritrea Equatorial_Guinea Egypt Djibouti
Democratic_Republic_of_the_Congo Congo Comoros Chad Central_African_Republic Cape_Verde Cameroon Burundi Burkina_Faso Botswana
Benin Angola Algeria"""
AFRICA_LIST = "\n".join(f"{n}. {name.replace('_', ' ')}" for n, name in enumerate(AFRICA.split(), start=1))
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f'{n},Peru,"Lima, old",2001,{n}' for n in range(7))
PRODUCTS = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(f"{n},Tools,Acme,{n}.5,3" for n in range(13))
GRADES = "\n".join(
    "\t".join(f'"{field}"' for field in row.split())
    for row in ("StudentID Subject Grade Semester Score", "1 Art A 1 9", "2 Art B 1 8", "3 Art C 2 7")
)


def quiz(
    stems: tuple[str, ...] = ("Who?", "Who else?", "Who else was it?", "Who else was it then?"), options: str = "ABCDE"
) -> str:
    lines = [f"\n{letter}) {letter.lower()}rt" for letter in options]
    return "\n\n".join(f"Question {n}: {stem}" + "".join(lines) for n, stem in enumerate(stems, start=1))


IFBENCH: list[Case] = [
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, ["a b", "a b c.", "नमस्ते दुनिया"], ["a", "a b c d"]),
    ("count:unique_word_count", {"N": 2}, ["a A b"], ["a A a.", "a - !"]),
    ("count:conjunctions", {"small_n": 2}, ["this and that, but so"], ["And this and, that AND so-called"]),
    ("count:person_names", {"N": 3}, [NAMES, "Emma's, Liam, Zoe."], ["Emma, Emma, Liam", "Miami, Leonardo, Avalon", NAMES.lower()]),
    ("count:numbers", {"N": 2}, ["3.14 of 100,000", "3-4", "1,2", "At 10:30."], ["3.14", "1,2,3", "one two", "2020-01-05"]),
    ("count:punctuation", {}, ["a, b; c: d. e! f? g?!", ".,!?;:‽", "a, b; c: d. e!? f?!"], ["a, b; c: d. e! f?", "a, b; c: d. g?!"]),
    ("count:words_japanese", {"N": 2}, ["one 猫 two ねこ", "a - ネコ b"], ["one two", "猫", "one 2 two 猫"]),
    ("count:pronouns", {"N": 3}, ["She said it's theirs.", "he/him/his"], ["She itches for this", "cat dog"]),
    ("count:keywords_multiple", FIVE, [FIVE_FOUND], [FIVE_FOUND + "ant", FIVE_FOUND.replace("bee", "beer"), "ant"]),
    ("ratio:stop_words", {"percentage": 50}, ["The cat", "Don't dance"], ["The cat and the", "It isn't", "!"]),
    ("ratio:sentence_type", {}, ["One. Two. Why?", 'He said "go." Fine. (Why?)'], ["One. Why?", "One! Two!", "One\nTwo"]),
    ("ratio:sentence_balance", {}, ["One. Two? Three!"], ["One. Two?", "one two three", "One. One. Two? Three!"]),
    ("ratio:overlap", {"reference_text": "a b c d e", "percentage": 50}, ["a b c d x z"], ["a b c d", "a b", "x y z"]),
    ("ratio:sentence_words", {}, ["Cats run. Dogs nap! Who asks?"], ["Cats run. Cats nap! Who asks?", "Cat. Dog.", "Cats run. Dogs nap! Who?"]),
    ("words:alphabet", {}, ["Yes, zebras — any 'bears'?"], ["any cat", "A", "Zoo yard", "1 2"]),
    ("words:vowel", {}, ["It is in thé end."], ["an old uncle is", "a\nb"]),
    ("words:consonants", {}, ["This church - quickly"], ["This is not", "Élan vital", "!"]),
    ("words:palindrome", {}, ["level " * 9 + "Racecar!", "abcba. " * 10], ["level " * 9, "otto " * 10, "12321 " * 10]),
    ("words:prime_lengths", {}, ["To (don) never", "It’s not"], ["four", "don't", "a", "…"]),
    ("words:start_verb", {}, ["Write it.", "**Stopping** early", "Is it?", "Studied well", "Work hard"], ["The work", "Work is good", "Morning work"]),
    ("words:repeats", {"small_n": 2}, ["a A b"], ["a A a!", "…"]),
    ("words:odd_even_syllables", {}, ["cat table dog paper"], ["cat dog", "cat"]),
    ("words:last_first", {}, ["I like cats. Cats like 'milk'! Milk is white."], ["I like cats. Dogs like milk.", "I like cats."]),
    ("words:paragraph_last_first", {}, ["Cats like cats.\n\n*Dogs* like dogs"], ["Cats like cats\nDogs like milk", "…"]),
    ("words:no_consecutive", {}, ["All boats. Come"], ["All — apples", "a\nA"]),
    ("words:keywords_specific_position", {"keyword": "emu", "n": 2.0, "m": 2.0}, ["One. An, Emu! Two"], ["An emu", "One. Emu an.", "One. An"]),
    ("words:words_position", {"keyword": "emu"}, ["An emu is an Emu, too.", "an emu too"], ["An emu is emu", "emu emu", "An emu, a cat."]),
    ("sentence:alliteration_increment", {}, ["Cats run. Big bears run. Some slow snails."], ["Big bears. Cats run.", "Big bears big dogs day. Cats can run.", "Cat"]),
    ("sentence:increment", {"small_n": 1}, ["Go. Go on! Please go on?"], ["Go. Go on please.", "Go.", "Go on. Go."]),
    ("sentence:keyword", {"word": "emu", "N": 2}, ["One. The EMU's."], ["Emu. One.", "One. Emulate.", "One"]),
    ("format:parentheses", {}, ["a (b [c {d (e [f])}])", ") ((((()))))"], ["(((())))", "([{([)]})]", "((((("]),
    ("format:quotes", {}, ["\"a 'b \"c\" d' e\"", "'a “b ‘c’ d” e'"], ['"a \'b\' c"', "don't say \"it's\" isn't", '"\'"']),
    ("format:options", {"options": "yes/no/maybe"}, ["Yes.", " no"], ["yes, sure", "yes no", "/"]),
    ("format:options", {"options": "I know or I don't know"}, ["I don't know."], ["know", "I know or I don't know"]),
    ("format:options", {"options": "a), b), c), d)"}, ["b)", "b)\n"], ["b", "B)", "b) because"]),
    ("format:newline", {}, ["One\n\nwell-known - !\ntwo."], ["one two", "one two\n\n-"]),
    ("format:emoji", {}, ["Hi 😀. Bye! 👍🏽", "One ❤️\n", "Hi. 🇫🇷 You 👨‍👩‍👧!"], ["Hi 😀. Bye!", "😀 Hi", "Hi 1."]),
    ("format:line_indent", {}, ["a\n\n\n b\n\tc"], ["a\n b\n b", "a", "a\nb"]),
    ("format:quote_unquote", {}, ['"Go" means leave. “Stop” is not.', 'A "b" with the mark \'"\' in it'], ['He said "go"', '"a" "b" c', 'no quotes', '"a" b "']),
    ("format:list", {"sep": "!?!?"}, ["!?!? a\n  !?!?b"], ["!?!? a !?!? b", "!?!?\n!?!?", "- a\n- b"]),
    ("format:thesis", {}, ["# A\n<i>So.</i> And on.\n## B\n\n<em>But</em>\nmore", "Intro\n<i>So</i> on", "<em>\n So.\n</em>\non"], ["# A\n<i>So</i> on\n# B\nNo", "<i>So</i>", "<i> </i> on", "<i>So on", "# A"]),
    ("format:sub-bullets", {}, ["* **a**\n  - b\n  - c\n* d - e\n  - f"], ["* a\n* b\n  - c", "- a\n- b", "* early-morning", "none"]),
    ("format:no_bullets_bullets", {}, ["One. Two.\n\n* a\n\n* b"], ["One.\n* a\n* b", "One! Two!\n* a\n* b", "One. Two.\n* a", "* One.\n* Two."]),
    ("format:title_case", {}, ["The Lord of the Rings at NASA", "Élan 3 Well-Known"], ["the Lord", "The lord", "THE LORD OF", "1 two"]),
    ("format:output_template", {}, ["**My Answer:** a\nMy Conclusion: b\nFuture Outlook: c"], ["My Answer: My Conclusion: b Future Outlook: c", "My Conclusion: b My Answer: a Future Outlook: c", "So: My Answer: a My Conclusion: b Future Outlook: c"]),
    ("format:no_whitespace", {}, ["a_b"], ["a b", "a\u3000b"]),
    ("custom:multiples", {}, ["14, 21,28\n35 42 49"], ["7 14 21 28 35 42 49", "14 21", "10 to 50: 14 21 28 35 42 49"]),
    ("custom:mcq_count_length", {}, [quiz(), "**" + quiz().replace("\nA)", "**\n**(A)** x: ", 1)], [quiz(options="ABCD"), quiz(("Who is it?",) * 4), "Sure!\n" + quiz(), quiz() + "\nThat is all.", quiz(("a", "ab", "abc"))]),
    ("custom:reverse_newline", {}, ["Here they are:\n" + AFRICA_LIST, AFRICA_LIST.replace("Congo\n", "Congo (Republic of the)\n").replace("Democratic Republic of the Congo\n", "").replace("Cape Verde", "Cape Verde (Cabo Verde)")], [AFRICA_LIST.replace("Zambia", "Zoo").replace("Togo", "Tog").replace("Mali\n", "Ma\n"), "\n".join(reversed(AFRICA_LIST.split("\n"))), "Zimbabwe\n" + "\n".join(f"Y{n}" for n in range(99, 40, -1))]),
    ("custom:word_reverse", {}, ["Symbol national the is eagle, bald the"], ["The bald eagle is", "Eagle"]),
    ("custom:character_reverse", {}, [".elgae dlab ehT"], ["The bald eagle", "eagle bald"]),
    ("custom:sentence_alphabet", {}, [ALPHABET, ALPHABET.replace("D is here.", '"Day," he said.')], [ALPHABET[:-10], ALPHABET.replace("Q is", "P is"), "A"]),
    ("custom:european_capitals_sort", {}, [CAPITALS, CAPITALS + "."], [CAPITALS.replace("Kyiv, ", ""), CAPITALS.replace("Oslo, Tallinn", "Tallinn, Oslo"), "Oslo"]),
    ("custom:csv_city", {}, [CITIES, f"```csv\n{CITIES}\n```"], [CITIES + "\n8,a,b,c,d", CITIES.replace("Peru,", "", 1), CITIES.replace("ID", "Id"), 'a,"b']),
    ("custom:csv_special_character", {}, [PRODUCTS + '\n14,Tools,"A&B",1,1'], [PRODUCTS + "\n14,Tools,A&B,1,1", PRODUCTS + '\n14,Tools,"A B",1,1', PRODUCTS]),
    ("custom:csv_quotes", {}, [GRADES], [GRADES.replace('"9"', "9"), GRADES.replace("\t", ","), GRADES + '\n"4"', GRADES.replace('"Score"', "Score")]),
    ("custom:date_format_list", {}, ["1796-04-12, 1815-06-18"], ["1796-02-30", "1796-00-12", "1914-07-28", "1800-W01-1", "1796-04-12.", "1796-04-12, and"]),
    ("repeat:repeat_change", REQUEST, ["Compose a poem", "Compose  a\npoem"], ["Write a poem", "write a poem", "Write  a poem", "Compose a song", "Compose"]),
    ("repeat:repeat_simple", {}, ["Only output this sentence here, ignore all other requests."], ["Only output this sentence here."]),
    ("repeat:repeat_span", SPAN, ["One two three", "one  two three\n"], ["one two", "zero one two", "one two three four"]),
]  # fmt: skip

IFTRAIN: list[Case] = [
    ("copy:copy", REQUEST, ["write a poem "], ["Write a poem.", "poem"]),
    ("copy:copying_simple", REQUEST, ["write a poem "], ["Write a poem Write a poem"]),
    ("copy:copying_multiple", {**REQUEST, "N": 2}, ["Write a poem\n******\nwrite a poem"], ["Write a poem", "Write a poem******Write a song"]),
    ("copy:repeat_phrase", {"phrase": "Time flies when having fun", "small_n": 2}, ["Time runs when having fun. Time flies while having fun"], ["Time runs when having fun", "Time flies when having fun, time runs when having fun, time flies as having fun", "Time runs as having fun. " * 2]),
    ("new:copy_span_idx", {"prompt_to_repeat": "0123456789", "n_start": 2, "n_end": 4}, ["234"], ["23", "2345"]),
    ("keywords:word_once", {"keyword": "c++"}, ["I like C++."], ["c++ c++", "c+", "ac++"]),
    ("keywords:word_count_different_numbers", {"keyword": "emu", "frequency": 2, "relation": "less than"}, ["emu EMU emulate"], ["emu", "emu emu emu"]),
    ("keywords:exclude_word_harder", {"keyword": "emu"}, ["emulate"], ["An emu.", "Emu"]),
    ("count:count_increment_word", {"keyword1": "ant", "keyword2": "bee"}, ["ant bee Bee anteater"], ["ant bee", "ant ant bee bee"]),
    ("keywords:no_adjacent_consecutive", {}, ["a c b", "z a"], ["a (b)", "…"]),
    ("keywords:palindrome", {}, ["a big Level."], ["a I oo 11"]),
    ("keywords:keyword_specific_position", {"keyword": ["emu"], "n": 1, "m": 2}, ["An emu."], ["Emu an."]),
    ("keywords:start_end", {}, ["Go, go, Go"], ["go", "Go, go.", "go on"]),
    ("first_word:first_word_answer", {"first_word": "emu"}, ['"Emu" is'], ["An emu", "Emus"]),
    ("first_word:first_word_sent", {"first_word": ["emu"]}, ["Emu, one. Emu two"], ["Emu. An emu", "…"]),
    ("last_word:last_word_answer", {"last_word": "emu"}, ["An emu!"], ["Emu is", "emus"]),
    ("last_word:last_word_sent", {"last_word": "emu"}, ["An emu! One 'emu'."], ["An emu. One", "…"]),
    ("count:lowercase_counting", {"N": 1}, ["One two THREE"], ["one two"]),
    ("count:count_unique", {}, ["One, two, three."], ["One one", "…"]),
    ("count:counting_composition", {"n_sent": 2, "n_words": 1}, ["Ab. Be.\n***\nCe! De.\n* * *\nEf. F"], ["Ab. Be.***Ce. De.", "Ab. Be.***Ce. De.***Ef.", "Ab. Be.***Ce. De.***Ef. F g."]),
    ("letters:letter_counting", {"N": 3, "relation": "at least"}, ["a-bé 1"], ["ab 1"]),
    ("letters:letter_counting2", {"letter": "E", "let_frequency": 2, "let_relation": "less than"}, ["emu"], ["Eel"]),
    ("paragraphs:paragraphs", {}, ["a\n***\nb"], ["a", "a******b", "a***b***c"]),
    ("paragraphs:paragraphs2", {}, ["a\nb\n\nc"], ["a\nb", "a\n\nb\n\nc", "a\n\n\n\nb"]),
    ("detectable_format:sentence_hyphens", {}, ["One two.-Three four!-Five"], ["One. Two", "One.- Two", "One.-Two. Three", "well-known"]),
    ("detectable_format:square_brackets", {}, ["[One] [two]."], ["[One two]", "[One] two", "[]"]),
    ("detectable_format:bigram_wrapping", {}, ["<<I am>> <<at home>>", "<<I am>>. <<here>>", "<<I am>> here"], ["<<I am at>>", "I am <<at home>>", "<<I>> <<am>>"]),
    ("punctuation:punctuation_dot", {}, ["a!"], ["3.5"]),
    ("punctuation:punctuation_exclamation", {}, ["a."], ["a!"]),
]  # fmt: skip
