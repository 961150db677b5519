"""sources/movielens.py: one small shop of films in the ways of the three editions."""
import pytest

from sources import movielens

FLAGS = "|".join("1" if n in (5, 14) else "0" for n in range(19))    # Comedy, Romance
EDITIONS = {
    "100k": {
        "u.data": "1\t2\t3\t881250949\n1\t1\t5\t881250950\n",
        "u.item": f"1|Amélie (2001)|01-Jan-2001||http://e.org|{FLAGS}\n2|Plain||||1{'|0' * 18}\n",
        "u.info": "1 users\n",
    },
    "1m": {
        "ratings.dat": "1::2::3::881250949\n1::1::5::881250950\n",
        "movies.dat": "1::Amélie (2001)::Comedy|Romance\n2::Plain::\n",
        "users.dat": "1::F::1::10::48067\n",
    },
    "20m": {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,2,3.5,881250949\n1,1,5.0,881250950\n",
        "movies.csv": 'movieId,title,genres\n1,"Amélie (2001)",Comedy|Romance\n'
                      "2,Plain,(no genres listed)\n",
        "tags.csv": "userId,movieId,tag,timestamp\n",
    },
}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("edition", EDITIONS)
def test_three_editions(tmp_path, edition, encoding):
    for name, text in EDITIONS[edition].items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert movielens.recognises(tmp_path)
    raw = movielens.read(tmp_path, None)
    assert list(zip(raw.users, raw.items, raw.times)) == [
        ("1", "2", 881250949), ("1", "1", 881250950),
    ]
    assert raw.catalog == {
        "1": {"title": "Amélie (2001)", "text": ["Comedy, Romance"], "language": "en",
              "images": []},
        "2": {"title": "Plain", "text": [], "language": "en", "images": []},
    }
    assert raw.clock == "seconds"
    assert raw.item_order == ["1", "2"]
    ratings = next(iter(EDITIONS[edition]))
    assert raw.notes == [f"{ratings}: columns not read: rating"]
