"""Names of places that two of IFBench's tasks ask for."""

from __future__ import annotations

#: As the names are written, in lower case without accents; other names of the same country after a slash.
_COUNTRIES = """
algeria, angola, benin, botswana, burkina faso, burundi, cabo verde / cape verde, cameroon, central african republic, chad,
comoros, congo / republic of the congo / congo republic / congo republic of the / congo brazzaville,
democratic republic of the congo / democratic republic of congo / dr congo / congo democratic republic of the / congo kinshasa / congo democratic republic,
cote d'ivoire / ivory coast, djibouti, egypt, equatorial guinea, eritrea, eswatini / swaziland, ethiopia, gabon, gambia, ghana,
guinea, guinea-bissau / guinea bissau, kenya, lesotho, liberia, libya, madagascar, malawi, mali, mauritania, mauritius, morocco,
mozambique, namibia, niger, nigeria, rwanda, sao tome and principe / sao tome principe, senegal, seychelles, sierra leone, somalia, south africa,
south sudan, sudan, tanzania, togo, tunisia, uganda, zambia, zimbabwe
"""

AFRICAN_COUNTRIES = {
    spelling.strip(): index
    for index, spellings in enumerate(_COUNTRIES.replace("\n", " ").split(","))
    for spelling in spellings.split("/")
}
"""Spelling -> which of the 54 countries."""

_CAPITALS = """
reykjavik, helsinki, oslo, tallinn, stockholm, riga, moscow, copenhagen, vilnius, minsk, dublin, berlin, amsterdam, warsaw,
london, brussels, kyiv / kiev, prague, luxembourg / luxembourg city, paris, vienna, bratislava, budapest, vaduz, chisinau,
bern / berne, ljubljana, zagreb
"""

NORTHERN_CAPITALS = [
    frozenset(spelling.strip() for spelling in spellings.split("/"))
    for spellings in _CAPITALS.replace("\n", " ").split(",")
]
"""Of European countries, north of 45 degrees, from north to south: the spellings of each."""
