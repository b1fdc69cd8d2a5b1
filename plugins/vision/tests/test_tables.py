"""Tables are read as they were meant, or refused with file and line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait_vision.tables import read_table


def written(folder, text, encoding="utf-8", name="list.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def rows(path, **options):
    return [row for _, row in read_table(path, **options)]


WANTED = [{"image": "a.png", "caption": "Ein Bär, müde"}, {"image": "b.png", "caption": 'sagt "hallo"'}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_with_their_marks_and_all_line_ends(tmp_path, encoding, newline):
    text = newline.join(["image,caption", 'a.png,"Ein Bär, müde"', 'b.png,"sagt ""hallo"""', ""])
    assert rows(written(tmp_path, text, encoding)) == WANTED


def test_big_endian_mark(tmp_path):
    text = 'image,caption\na.png,"Ein Bär, müde"\nb.png,"sagt ""hallo"""'
    assert rows(written(tmp_path, b"\xfe\xff" + text.encode("utf-16-be"))) == WANTED


def test_another_encoding_is_told_by_file_and_line_and_read_when_named(tmp_path):
    path = written(tmp_path, 'image,caption\n"a.png","zwei\nZeilen"\nb.png,Bär\n', "latin-1")
    with pytest.raises(ValueError, match=r"list\.csv, line 4: byte 0xe4 is not utf-8; .*encoding: latin-1"):
        rows(path)
    assert rows(path, encoding="latin-1")[1]["caption"] == "Bär"
    with pytest.raises(ValueError, match=r"list\.csv is not UTF-8 text: it has zero bytes; if it is UTF-16"):
        rows(written(tmp_path, "image,caption\na,b", "utf-16-le"))
    with pytest.raises(ValueError, match="encoding is 'klingon', which is unknown"):
        rows(path, encoding="klingon")


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_the_delimiter_is_seen_in_the_header(tmp_path, delimiter):
    text = f'image{delimiter}caption\na.png{delimiter}"x{delimiter} y"\n'
    assert rows(written(tmp_path, text)) == [{"image": "a.png", "caption": f"x{delimiter} y"}]


def test_a_header_that_could_be_cut_in_two_ways_is_asked_about(tmp_path):
    path = written(tmp_path, "image,caption;lang\na,b;c\n")
    with pytest.raises(ValueError, match="could be cut at ',' or at ';'; say which by delimiter"):
        rows(path)
    assert rows(path, delimiter=";") == [{"image,caption": "a,b", "lang": "c"}]
    assert list(rows(written(tmp_path, "image\ta, b\nx\ty\n", name="list.tsv"))[0]) == ["image", "a, b"]
    with pytest.raises(ValueError, match="delimiter is ';;'; expected one character"):
        rows(path, delimiter=";;")


def test_an_unquoted_comma_is_an_error_and_no_shorter_caption(tmp_path):
    path = written(tmp_path, "image,caption\na.png,a dog\n\nb.png,a cat, asleep\n")
    with pytest.raises(
        ValueError, match=r"list\.csv, line 4: the row has 3 cells and the header 2 \(image, caption\); put"
    ):
        rows(path)
    with pytest.raises(ValueError, match="line 2: the row has 1 cells and the header 2"):
        rows(written(tmp_path, "image,caption\na.png\n"))


def test_quotes_that_do_not_fit_are_told_or_taken_as_they_are(tmp_path):
    path = written(tmp_path, 'image\tcaption\na.png\t"Hello" she said\nb.png\tx\n', name="list.tsv")
    with pytest.raises(ValueError, match=r"list\.tsv, line 2: the cell's quotes do not fit .*quotes: false"):
        rows(path)
    assert rows(path, quotes=False)[0]["caption"] == '"Hello" she said'
    with pytest.raises(ValueError, match="line 3: the cell's quotes do not fit"):
        rows(written(tmp_path, 'image,caption\na,b\nc,"d\ne,f\n'))


def test_what_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv cannot be read"):
        rows(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is empty; expected a header"):
        rows(written(tmp_path, "\n\n"))
    with pytest.raises(ValueError, match="duplicate column 'image' in the header"):
        rows(written(tmp_path, "image,image\na,b\n"))
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        rows(written(tmp_path, "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"))


def test_lines_are_counted_where_rows_begin(tmp_path):
    path = written(tmp_path, '\n\nimage,caption\na,"two\nlines"\n\nb,c\n')
    assert [line for line, _ in read_table(path)] == [4, 7]


def test_a_column_of_row_numbers_without_a_name(tmp_path):
    assert rows(written(tmp_path, ",image,caption\n0,a,b\n")) == [{"": "0", "image": "a", "caption": "b"}]


cells = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)


@given(table=st.lists(st.tuples(cells, cells), max_size=5), delimiter=st.sampled_from(",\t;|"))
def test_what_csv_writes_is_read_back(tmp_path_factory, table, delimiter):
    import csv

    path = tmp_path_factory.mktemp("t") / "list.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("image", "caption"), *table])
    assert [tuple(row.values()) for row in rows(path)] == table
