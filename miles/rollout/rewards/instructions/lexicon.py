"""Words of English that instructions speak of by their kind: closed classes, fifty first names, and the commonest verbs."""

from __future__ import annotations

from .text import word_set

CONJUNCTIONS = word_set("and but for nor or so yet")
"""The coordinating ones."""

PERSON_NAMES = word_set(
    "Abigail Alexander Amelia Andrew Aria Audrey Ava Benjamin Charlotte Chloe Christopher Claire Daniel David Elijah Ella"
    " Emma Ethan Gabriel Grace Hannah Harper Isabella Jackson Jacob Jonathan Joseph Layla Leo Liam Lily Lucas Mason Matthew"
    " Mia Nathan Nicholas Noah Nora Olivia Owen Penelope Ryan Samuel Scarlett Sophia Stella Thomas Victoria Zoe"
)
"""Those that the prompt of `count:person_names` lists."""

_PERSONAL = word_set(
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself"
    " it its itself they them their theirs themselves"
)
_DEMONSTRATIVE = word_set("this that these those")
_INTERROGATIVE = word_set("who whom whose which what")

PRONOUNS = frozenset(
    _PERSONAL
    | _DEMONSTRATIVE
    | _INTERROGATIVE
    | word_set("whoever whomever whatever whichever")
    | frozenset(some + one for some in ("any", "every", "some", "no") for one in ("body", "one", "thing")) - {"noone"}
    | word_set("each either neither both all some any none")
)

_AUXILIARIES = word_set(
    "am is are was were be been being have has had having do does did doing can will would should could might must shall"
    " may ought need"
)

STOP_WORDS = frozenset(
    _PERSONAL
    | _DEMONSTRATIVE
    | _INTERROGATIVE
    | (_AUXILIARIES - {"could", "would", "might", "must", "shall", "may", "ought", "need"})
    | word_set("a an the and but if or because as until while than nor so")
    | word_set("of at by for with about against between into through during before after above below to from")
    | word_set("up down in out on off over under again further then once")
    | word_set("here there when where why how all any both each few more most other some such")
    | word_set("no not only own same too very just now")
    # What contractions leave.
    | word_set(
        "don didn doesn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn mustn needn s t d m ll re ve"
    )
)

#: First words that give an order or report a deed. Those that are as often nouns count as verbs unless what follows says otherwise.
_VERBS = word_set(
    "accept achieve acknowledge acquire act adapt add address adjust adopt advise agree aim align allow analyze analyse answer"
    " anticipate apologize appear apply appreciate approach arrange arrive ask assemble assess assign assist assume attach"
    " attempt attend avoid bake balance be become begin behold believe boil boost bring build buy calculate call capture"
    " care carry catch celebrate challenge change check choose clarify classify clean clear click climb close collaborate"
    " collect combine come commit communicate compare complete compose compute conclude conduct configure confirm connect"
    " consider consist construct consult contact contain continue contrast contribute convert convince cook copy correct"
    " count cover craft create cultivate cut dance deal decide declare decrease define delete deliver demonstrate deny"
    " depend deploy describe deserve design desire destroy detect determine develop devise dig discover discuss display"
    " distribute dive divide do document download draft draw dream drink drive drop earn eat edit educate elaborate"
    " elevate eliminate embark embrace emerge emphasize employ empower enable encourage engage enhance enjoy ensure enter"
    " entertain establish estimate evaluate examine execute exercise exist expand expect experience experiment explain"
    " explore express extend extract face facilitate fall feel fetch fight figure fill filter find finish fix fly focus"
    " follow forget forgive form format foster gain gather generate get give go grab grant greet grow guarantee guess guide"
    " handle happen hate have hear help hide highlight hire hold hope identify ignore illustrate imagine immerse implement"
    " import improve include incorporate increase indicate influence inform initialize initiate innovate insert inspect"
    " inspire install integrate introduce invest investigate invite involve join journey judge jump justify keep kick know"
    " lack laugh launch lead lean learn leave lend let leverage lie lift like limit list listen live load locate look lose"
    " love maintain make manage mark master match maximize mean measure meet mention merge minimize miss mix modify monitor"
    " motivate move multiply navigate need negotiate note notice nurture obey observe obtain occur offer open operate"
    " optimize order organize outline overcome own paint participate pass pause pay perform permit persuade pick picture"
    " place plan plant play pour practice praise predict prefer prepare present preserve press prevent print prioritize"
    " proceed process produce program promise promote propose protect prove provide publish pull purchase pursue push put"
    " quit quote raise reach read realize reason recall receive recognize recommend record recover reduce refer refine"
    " reflect refuse regard register reject relate relax release rely remain remember remind remove rename render repeat"
    " replace reply report represent request require research resolve respect respond rest restore retrieve return reveal"
    " review revise rewrite ride rise roll run save say schedule search see seek seem select sell send separate serve set"
    " settle shape share shift shine show sign simplify sing sit sleep slice smell smile solve sort spark speak spend"
    " split spread stand start state stay step stir stop store strengthen stretch strike strive structure study submit"
    " succeed suffer suggest summarize supply support suppose surround survive switch take talk teach tell tend test thank"
    " think throw tie touch track trade train transform translate travel treat try tune turn understand unite unlock"
    " unleash update upgrade upload use utilize validate value vary verify view visit visualize vote wait wake walk want"
    " warn wash watch wear weave welcome win wish witness wonder work worry wrap write yield"
)
_IRREGULAR = word_set(
    "became began begun brought built bought caught chose chosen came dealt dug drew drawn drove driven ate eaten fell"
    " fallen felt fought found flew flown forgot forgotten forgave got gotten gave given went gone grew grown held hid"
    " hidden heard kept knew known led left lent lost made meant met paid proved proven ran rose risen said saw seen sought"
    " sold sent shone showed shown sang sung sat slept spoke spoken spent stood struck took taken taught told thought threw"
    " thrown understood woke wore worn wove won wrote written lay lain sewn kneel knelt swam swum"
)
#: After a noun, not after an order.
_PREDICATES = _AUXILIARIES - {"do", "be", "been", "being", "doing", "having", "need", "have"} | {"of"}


def _is_verb(word: str) -> bool:
    if word in _VERBS or word in _IRREGULAR or word in _AUXILIARIES:
        return True
    for ending in ("ing", "ed", "es", "s", "d"):
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 2:
            continue
        stems = {stem}
        if not stem.endswith("e"):
            stems.add(stem + "e")
        if stem.endswith("i"):
            stems.add(stem[:-1] + "y")
        if stem[-1] == stem[-2]:
            stems.add(stem[:-1])
        if stems & _VERBS:
            return True
    return False


def starts_with_verb(beginning: list[str]) -> bool:
    """Whether the first of the words is a form of one of the commonest verbs. As a noun, "Change is good", it is none.

    >>> starts_with_verb(["stopping", "early"]), starts_with_verb(["work", "is"]), starts_with_verb(["the", "work"])
    (True, False, False)
    """
    first, after = [*(word.split("'")[0] for word in beginning[:2]), "", ""][:2]
    is_noun = after in _PREDICATES and first not in _AUXILIARIES and not first.endswith("ing")
    return _is_verb(first) and not is_noun
