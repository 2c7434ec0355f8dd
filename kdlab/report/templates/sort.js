document.querySelectorAll('table.sortable').forEach(function (table) {
  table.querySelectorAll('thead button').forEach(function (button, column) {
    button.addEventListener('click', function () {
      var heading = button.parentNode, up = heading.getAttribute('aria-sort') !== 'ascending';
      table.querySelectorAll('thead th').forEach(function (th) { th.removeAttribute('aria-sort'); });
      heading.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      var body = table.tBodies[0], rows = Array.prototype.slice.call(body.rows);
      rows.sort(function (a, b) {
        var x = a.cells[column].dataset.value, y = b.cells[column].dataset.value;
        if (x === '' || y === '') { return (x === '') - (y === ''); }
        var both = !isNaN(x) && !isNaN(y);
        var order = both ? x - y : x.localeCompare(y, undefined, {numeric: true});
        return up ? order : -order;
      });
      rows.forEach(function (tr) { body.appendChild(tr); });
    });
  });
});
