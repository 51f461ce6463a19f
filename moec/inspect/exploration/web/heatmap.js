// A heat map over the full width: axes with titles and ticks, numbers in the cells, and its scale.
import {el} from './elements.js';
import {svg} from './picture.js';

const SHADES=9;
// `value(x, y)` is a number or null; `most` the end of the scale, `show` writes a number of it.
// `tell(x, y)` describes a cell, `picked()` is the row that is marked, `onpick(x, y)` takes a click.
export function heatMap({title,columns,rows,columnTitle,rowTitle,value,most,show,unit,tell,picked,onpick,numbers=show}){
  const box=el('div',{class:'heat'}),says=el('span',{class:'soft small says','aria-live':'polite'});
  const scale=el('span',{class:'scale'},el('span',{class:'small'},show(0)),
    ...Array.from({length:SHADES},(_,i)=>el('i',{class:`q${i}`})),el('span',{class:'small'},`${show(most)} ${unit}`));
  const shadeOf=v=>Math.max(0,Math.min(SHADES-1,Math.round(v/(most||1)*(SHADES-1))));
  function redraw(){
    const width=box.clientWidth;
    if(!width)return;
    const longest=Math.max(...rows.map(r=>r.length)),left=Math.min(width*0.3,24+longest*6.6),cw=(width-left-1)/columns.length;
    const ch=rows.length>96?6:rows.length>48?10:rows.length>24?16:24,bottom=36,height=rows.length*ch+bottom;
    const every=Math.ceil(Math.max(34,10+6.4*Math.max(...columns.map(c=>c.length)))/cw),everyRow=Math.ceil(13/ch),most_=Math.floor((left-24)/6.2);
    const paths=Array.from({length:SHADES},()=>''),texts=[],f=n=>n.toFixed(1),gap=Math.min(1,cw/8);
    for(let y=0;y<rows.length;y++)for(let x=0;x<columns.length;x++){
      const v=value(x,y);
      if(v===null)continue;
      const s=shadeOf(v);
      paths[s]+=`M${f(left+x*cw)} ${y*ch}h${f(cw-gap)}v${ch-Math.min(1,ch/8)}h-${f(cw-gap)}z`;
      if(cw>=30&&ch>=14&&v)texts.push(svg('text',{class:s>4?'cell dark':'cell',x:f(left+(x+.5)*cw),y:y*ch+ch/2+4,'text-anchor':'middle'},numbers(v)));
    }
    const row=picked?.();
    box.replaceChildren(svg('svg',{width,height,role:'img','aria-label':`${title}: ${rows.length} ${rowTitle} by ${columns.length} ${columnTitle}`},
      ...paths.map((d,i)=>svg('path',{class:`q${i}`,d})),...texts,
      ...rows.flatMap((r,y)=>y%everyRow?[]:[svg('text',{class:`tick row-tick${row===y?' on':''}`,x:left-6,y:y*ch+ch/2+4,'text-anchor':'end'},r.length>most_?`…${r.slice(1-most_)}`:r)]),
      ...columns.flatMap((c,x)=>x%every?[]:[svg('text',{class:'tick column-tick',x:f(left+(x+.5)*cw),y:height-bottom+14,'text-anchor':'middle'},c)]),
      svg('text',{class:'axis',x:left+(width-left)/2,y:height-4,'text-anchor':'middle'},columnTitle),
      svg('text',{class:'axis',transform:`translate(11 ${f((height-bottom)/2)}) rotate(-90)`,'text-anchor':'middle'},rowTitle),
      row===undefined?null:svg('rect',{class:'picked',x:left-1,y:row*ch-1,width:width-left,height:ch+1})));
    box.cell=e=>{
      const b=box.getBoundingClientRect(),x=Math.floor((e.clientX-b.left-left)/cw),y=Math.floor((e.clientY-b.top)/ch);
      return x>=0&&x<columns.length&&y>=0&&y<rows.length?[x,y]:null;
    };
  }
  box.addEventListener('mousemove',e=>{const c=box.cell?.(e);says.textContent=c?tell(...c):''});
  if(onpick)box.addEventListener('click',e=>{const c=box.cell?.(e);if(c)onpick(...c)});
  new ResizeObserver(redraw).observe(box);
  const figure=el('figure',{class:'map'},el('figcaption',{},el('b',{},title),scale,says),box);
  figure.redraw=redraw;
  return figure;
}
